"""What was decided about each input, kept in SQLite or PostgreSQL: off unless `PSIM_AUDIT_URL` is
set, since even decisions without texts say something about those who sent them."""
