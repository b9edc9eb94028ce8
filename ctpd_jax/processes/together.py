"""Where several processes wait for one another, for as long as that takes.

Not in a collective on the devices: that has time limits of its own, and tells nobody who is missing. They meet in the
store that all processes share; a process that has died ends the others, which JAX sees to.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.processes import messages

EVERY = 60.0  # seconds between two lines that say who is waited for
_numbers = itertools.count()


def several() -> bool:
    """Return whether this process has joined others: then it is JAX that listens to SIGTERM."""
    # Not by jax.process_count(), which would start the back end too early.
    jax = sys.modules.get("jax")  # who has not imported it has one process
    return jax is not None and jax.distributed.is_initialized()


def client() -> Any:
    """Return JAX's client of the store that all processes share; there is no public way to it."""
    from jax._src import distributed

    return distributed.global_state.client


def meet(name: str) -> None:
    """Wait until every process has come to this place; all of them come to the same places in the same order.

    Raises:
      UserError: another process is at another place.
      ConnectionError: one of them is gone.
    """
    if not several():
        return
    import jax

    store, own, number = client(), jax.process_index(), next(_numbers)
    place = f"ctpd/meet/{number}"
    store.key_value_set(f"{place}/{own}", name)
    # The first one looks for everybody and tells them: as many questions as there are processes, and not their square.
    if own == 0:
        places = {other: _told(store, place, str(other), name) for other in range(jax.process_count())}
        others = [f"process {other} is at '{there}'" for other, there in places.items() if there != name]
        store.key_value_set(f"{place}/all", f"{others[0]}, process 0 at '{name}'" if others else "")
        if number:  # whoever is here has left the place before
            store.key_value_delete(f"ctpd/meet/{number - 1}/")
    if said := _told(store, place, "all", name):
        raise UserError(f"{said}: their code, configs or data differ. Start all of them anew from the same.")


def _told(store: Any, place: str, who: str, name: str) -> str:
    """Return what a process has left at a place as soon as it has, and say now and then who is still missing."""
    import jax

    began = time.monotonic()
    while True:
        try:
            return store.blocking_key_value_get(f"{place}/{who}", int(1000 * EVERY))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise ConnectionError(f"{name}: a process that was waited for has died ({str(error)[:200]})") from None
        here = {path.rpartition("/")[2] for path, _ in store.key_value_dir_get(place)}
        missing = [number for number in range(jax.process_count()) if str(number) not in here]
        # One of those that wait speaks for all.
        if missing and all(number in missing for number in range(jax.process_index())):
            numbers = ", ".join(map(str, missing[:8])) + (" and others" if missing[8:] else "")
            minutes = (time.monotonic() - began) / 60
            messages.say(f"{name}: waited {minutes:.0f} min for process {numbers}", shown=sys.stderr)
