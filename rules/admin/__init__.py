"""The admin pages of rules. Django imports this package; each module registers its pages."""

from rules.admin import alarms, chains, rejected

__all__ = ["alarms", "chains", "rejected"]
