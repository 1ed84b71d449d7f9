"""`cantata report`: runs as one page that needs no network."""
