"""What the audit does in PostgreSQL only."""
