"""The decision about each input, kept in SQLite or PostgreSQL.

It is off unless `PSIM_AUDIT_URL` is set: even decisions without texts reveal something about those
who sent the inputs.
"""
