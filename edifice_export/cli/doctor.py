"""The command `doctor`."""

from __future__ import annotations

import dataclasses

from .console import print_json, print_table, say
from .options import Json

__all__ = ["doctor"]


def doctor(as_json: Json = False) -> None:
    """Show which providers really work on this machine, and what the others lack."""
    from ..runtime.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print_json(dataclasses.asdict(diagnosis))
        return
    print_table(
        [
            ("python", diagnosis.python),
            ("platform", diagnosis.platform),
            *((package, found or "not installed") for package, found in diagnosis.packages.items()),
            ("build", "works" if diagnosis.can_build else "needs torch: pip install torch"),
        ]
    )
    say()
    print_table(
        [
            ("provider", "usable", "missing"),
            *((state.name, "yes" if state.usable else "no", state.missing or "") for state in diagnosis.providers),
        ]
    )
