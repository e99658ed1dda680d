"""The audit log: who did what, in a chain of hashes that shows whether somebody has changed it afterwards."""
