-- What a new PostgreSQL needs before `farebox migrate`: two logins and a database. psql runs it as a superuser:
--   FAREBOX_OWNER_PASSWORD=... FAREBOX_APP_PASSWORD=... psql --file postgres-init.sql
\set ON_ERROR_STOP on
\getenv owner_password FAREBOX_OWNER_PASSWORD
\getenv app_password FAREBOX_APP_PASSWORD

-- Owns the schema and migrates it. CREATEROLE, for the group roles that the migrations make.
CREATE ROLE farebox_owner LOGIN CREATEROLE PASSWORD :'owner_password';

-- Serves. It gets its rights from `farebox migrate --grant-to farebox_app`.
CREATE ROLE farebox_app LOGIN PASSWORD :'app_password';

CREATE DATABASE farebox OWNER farebox_owner;
