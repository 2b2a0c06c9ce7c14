"""The ledger: everything that was decided and everything that happened. The only room that knows SQL."""
