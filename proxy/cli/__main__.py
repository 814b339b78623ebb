"""`python -m proxy.cli`, for where the command isn't installed."""

from proxy.cli import main

main()
