"""The name of every Redis key. Keys of one partition share the hash tag {partition}."""

from __future__ import annotations


def events(lane: str, partition: int) -> str:
    """Stream: one entry holds the events of one request for this lane and partition."""
    return f"aemos:events:{lane}:{{{partition}}}"


def ledger(lane: str, partition: int) -> str:
    """Hash of exact counts in events: accepted, processed, duplicate, dead, depth."""
    return f"aemos:ledger:{lane}:{{{partition}}}"


def depth_by_organization(lane: str, partition: int) -> str:
    """Hash: organization id -> how many of its events the slot holds."""
    return f"aemos:depth-by-organization:{lane}:{{{partition}}}"


def delayed(lane: str, partition: int) -> str:
    """Sorted set of events that wait for another attempt; the score is the due time in ms."""
    return f"aemos:delayed:{lane}:{{{partition}}}"


def ticket(lane: str, partition: int) -> str:
    """Flag that expires: a drain ticket is queued for the partition."""
    return f"aemos:ticket:{lane}:{{{partition}}}"


def lease(lane: str, partition: int) -> str:
    """Fencing token of the worker that drains the partition."""
    return f"aemos:lease:{lane}:{{{partition}}}"


def listeners(lane: str) -> str:
    """Sorted set: workers that listen to the lane; the score says until when, in ms."""
    return f"aemos:listeners:{lane}"


def paused(lane: str) -> str:
    """JSON that expires: who has paused the lane, until when and why."""
    return f"aemos:paused:{lane}"


def checkpoint(lane: str, partition: int) -> str:
    """Id of the event that is being decided while a worker takes over what another one died on."""
    return f"aemos:checkpoint:{lane}:{{{partition}}}"


def condition_state(partition: int, condition: str) -> str:
    """JSON that expires: the state of a condition over time about a source of this partition."""
    return f"aemos:condition-state:{{{partition}}}:{condition}"


def stalled(lane: str, partition: int) -> str:
    """Text that expires: why the partition waits (database away, for example)."""
    return f"aemos:stalled:{lane}:{{{partition}}}"


def latest(source_type: str, uuid: str) -> str:
    """Hash: variable or state name -> packed (timestamp in us, value), the newest known."""
    return f"aemos:latest:{source_type}:{uuid}"


def last_published(device_uuid: str) -> str:
    """Hash that expires: state -> number of its newest change on the stream of notifications, on whose server it is."""
    return f"aemos:last-published:{{{NOTIFICATIONS}}}:{device_uuid}"


NOTIFICATIONS = "aemos:notifications"  # stream the gateways read
NOTIFICATIONS_MQTT_GROUP = "mqtt"
TIMERS = (
    "aemos:timers"  # sorted set: chain and source -> when its outcome may change by itself, in ms; inf for not at all
)
TIMERS_SCAN_LOCK = "aemos:timers-scan-lock"  # flag that expires: chains that need a timer were looked for a moment ago
TIMERS_DIRTY = (
    "aemos:timers-dirty"  # set: device|uuid of devices whose state changed since the scheduler looked at chains
)
SCHEDULER_LEADER = "aemos:scheduler:leader"
MQTT_TELEMETRY_LEADER = "aemos:mqtt-telemetry:leader"
MQTT_REPORTS_LEADER = "aemos:mqtt-reports:leader"
MQTT_PUBLISHER_LEADER = "aemos:mqtt-publisher:leader"
BROKER_SYNC_LEADER = "aemos:broker-sync:leader"
REJECTED = "aemos:rejected"  # hash: reason -> refused events; "unrecorded" -> those of them that were not kept


def replay_ticket(uuid: str) -> str:
    """Flag that expires: the next step of the replay is queued."""
    return f"aemos:replay-ticket:{uuid}"


def replay_lease(uuid: str) -> str:
    """Flag that expires: a worker does a step of the replay."""
    return f"aemos:replay-lease:{uuid}"


def replay_pace(uuid: str) -> str:
    """Time in seconds up to which the replay has used its rate; expires."""
    return f"aemos:replay-pace:{uuid}"


RATES = "aemos:rates"  # JSON that expires: how fast the queue drains and fills, by lane
BROKER_LOAD = "aemos:broker-load"  # hash that expires: messages that the MQTT broker holds, and has dropped
UPKEEP_LOCK = "aemos:notifications:upkeep-lock"  # flag that expires: overdue deliveries were looked for a moment ago
LIVE_READINGS = "aemos:live-readings"  # channel: readings that somebody watches, from workers to gateways
LIVE_READINGS_WATCHED = (
    "aemos:live-readings:watched"  # sorted set: variable id -> until when (s) a gateway wants its readings
)


def failures(limit: str, digest: str) -> str:
    """Number that expires: failed attempts to prove who one is, of one address or account."""
    return f"aemos:failures:{limit}:{digest}"


RETENTION_LOCK = "aemos:retention-lock"  # flag that expires: what is too old was deleted within the last hour
NOTIFICATION_RETENTION_LOCK = "aemos:notifications:retention-lock"  # the same for notifications
ROLLUPS_LOCK = "aemos:rollups-lock"  # flag that expires: readings were rolled up within the last minute
HISTORY_RETENTION_LOCK = (
    "aemos:history-retention-lock"  # flag that expires: old readings were looked for within the last hour
)
METRICS = "aemos:metrics"  # hash: metric and label values -> sum of what all processes counted
QUEUE_SAMPLES = "aemos:queue-samples"  # list: the queue of the last hour, a JSON every ten seconds
QUEUE_SAMPLED = "aemos:queue-sampled"  # flag that expires: the queue was sampled a moment ago
