"""Why a reading is suspect."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a reading is suspect."""

    BELOW_MINIMUM = "below-minimum"
    ABOVE_MAXIMUM = "above-maximum"
    STEP = "step-too-large"
    STUCK = "stuck"
