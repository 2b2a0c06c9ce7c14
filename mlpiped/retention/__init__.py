"""What is kept and what goes: decided by rules, carried out in bites, hourly and on request."""
