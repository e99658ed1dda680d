"""Units that people choose for what they see and type: a value in the unit of its variable in, the same in another one out. Pure.

Nothing is stored or reported in them: sensors, the API, exports and chains speak the unit of the variable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

CELSIUS, FAHRENHEIT = "°C", "°F"
MILLISIEMENS, MICROSIEMENS, PPM_500, PPM_700 = "mS/cm", "µS/cm", "ppm (500)", "ppm (700)"
# Factor and offset that lead to °C and to mS/cm. Plain "ppm" is none of them: it may be CO2, or either of two scales of salt.
_TEMPERATURES: Mapping[str, tuple[float, float]] = {
    CELSIUS: (1.0, 0.0),
    "C": (1.0, 0.0),
    FAHRENHEIT: (5 / 9, -160 / 9),
    "F": (5 / 9, -160 / 9),
    "K": (1.0, -273.15),
}
_CONDUCTIVITIES: Mapping[str, tuple[float, float]] = {
    MILLISIEMENS: (1.0, 0.0),
    "dS/m": (1.0, 0.0),
    MICROSIEMENS: (0.001, 0.0),
    "uS/cm": (0.001, 0.0),
    PPM_500: (1 / 500, 0.0),
    PPM_700: (1 / 700, 0.0),
}
# That many digits that count, and of what is shown no more decimals than that: 0 °F, kept in °C, is not -0.00000000004 °F.
SHOWN_DIGITS, STORED_DIGITS = 6, 12


class Scale(NamedTuple):
    """How the values of one variable are shown: times `factor`, plus `offset`, in `unit`."""

    unit: str = ""
    factor: float = 1.0
    offset: float = 0.0

    @property
    def is_own(self) -> bool:
        """Whether values are shown as they are stored."""
        return self.factor == 1.0 and self.offset == 0.0

    def shown(self, value: float) -> float:
        return (
            value
            if self.is_own
            else _rounded(round(value * self.factor + self.offset, SHOWN_DIGITS), SHOWN_DIGITS) + 0.0
        )

    def text(self, value: float) -> str:
        """Without the unit."""
        return str(value) if self.is_own else f"{self.shown(value):g}"

    def stored(self, value: float) -> float:
        """Rounded, so that what is shown again is what was typed."""
        return value if self.is_own else _rounded((value - self.offset) / self.factor, STORED_DIGITS)

    @property
    def of_differences(self) -> Scale:
        """For how much a value changed: 10 °C more are 18 °F more, and not 50."""
        return self._replace(offset=0.0)


class Units(NamedTuple):
    """What somebody wants to see; "" is the unit of the variable."""

    temperature: str = ""
    conductivity: str = ""

    def scale_of(self, unit: str) -> Scale:
        for known, wanted in ((_TEMPERATURES, self.temperature), (_CONDUCTIVITIES, self.conductivity)):
            if unit in known and wanted in known and known[unit] != known[wanted]:
                (factor, offset), (divisor, wanted_offset) = known[unit], known[wanted]
                return Scale(wanted, factor / divisor, (offset - wanted_offset) / divisor)
        return Scale(unit)


AS_STORED = Units()


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
