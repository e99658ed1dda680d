-- For psql as the superuser of PostgreSQL. Run again, it sets the password again.
SELECT 'CREATE ROLE aemos LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'aemos') \gexec
ALTER ROLE aemos PASSWORD '$database_password';
SELECT 'CREATE DATABASE aemos OWNER aemos' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'aemos') \gexec
