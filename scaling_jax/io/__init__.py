"""The world outside: files, locks, stores, worker processes. Knows nothing of models, runs or scans."""
