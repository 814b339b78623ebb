"""Farebox on one machine: the embedded PostgreSQL, its state directory, the demo upstream and `farebox demo`.

Nothing below this package knows that it exists: the application is given a DSN, whoever runs the database.
"""
