"""The five numbers that name a layer's problem: tokens, hidden size, intermediate size, experts, experts per token."""

from typing import NamedTuple


class Thiek(NamedTuple):
    """T tokens, H hidden size, I intermediate size, E experts, K experts per token."""

    T: int
    H: int
    I: int
    E: int
    K: int

    @property
    def rows(self) -> int:
        """Routed rows under top-K, T*K."""
        return self.T * self.K

    def __str__(self) -> str:
        return ",".join(map(str, self))


def parse(text: str) -> Thiek:
    """Read "T,H,I,E,K".

    Raises:
        ValueError: not five integers, T below 0, or another number below 1.
    """
    try:
        thiek = Thiek(*(int(number) for number in text.split(",")))
    except (ValueError, TypeError):
        raise ValueError(f"thiek={text!r}: must be five integers T,H,I,E,K separated by commas") from None
    for name, value in thiek._asdict().items():
        least = 0 if name == "T" else 1
        if value < least:
            raise ValueError(f"thiek={text!r}: {name}={value} must be at least {least}")
    return thiek
