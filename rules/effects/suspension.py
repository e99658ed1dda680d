"""Suspend chains that fail again and again: they leave every worker's index, and an alarm notifies people."""

from __future__ import annotations

import logging

from django.db import transaction
from django.utils import timezone

from aemos.lib import metrics
from devices import catalogue
from rules.effects import alarms, chain_ends
from rules.models import ChainStatistics, RuleChain

log = logging.getLogger(__name__)


def suspend(chain_id: int, reason: str) -> bool:
    """Stops a chain until somebody lifts it, and raises an alarm; `reason` is the end of a sentence.

    False when it does not run anyway: suspended by another worker, switched off or deleted. Raises django.db.Error.
    """
    with transaction.atomic():
        if not RuleChain.objects.running().filter(pk=chain_id).update(suspended_at=timezone.now()):
            return False
        chain = RuleChain.objects.get(pk=chain_id)
        catalogue.mark_changed(chain.organization_id)
        left = "".join(f"; {each}" for each in chain_ends.left_on(chain))
        alarms.raise_for_chain(chain, f"{chain.name} is suspended: {reason}{left}")
    metrics.CHAINS_SUSPENDED.inc()
    log.error("rule chain %s (%s) is suspended: %s", chain, chain.uuid, reason, extra={"chain": str(chain.uuid)})
    return True


def resume(chain: RuleChain, by: str) -> None:
    """Lets a chain run again and count its failures from none, clears its alarm. Changes nothing of one that runs."""
    with transaction.atomic():
        lifted = RuleChain.objects.filter(pk=chain.pk).exclude(suspended_at=None).update(suspended_at=None)
        ChainStatistics.objects.filter(chain=chain).update(failures_in_a_row=0)
        catalogue.mark_changed(chain.organization_id)
        cleared = alarms.clear_for_chain(chain, by=by)
    chain.suspended_at = None
    if lifted or cleared:
        log.info("rule chain %s (%s) runs again: lifted by %s", chain, chain.uuid, by, extra={"chain": str(chain.uuid)})
