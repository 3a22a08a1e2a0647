"""From a plan to running ranks: what is missing, how it is submitted, what a rank is, and how far it has come."""
