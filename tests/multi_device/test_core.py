"""The core functions on eight simulated devices, under every transformation."""

from helpers.eight_devices import run_on_eight_devices


def test_core_gives_one_set_of_numbers_under_every_transformation() -> None:
    assert "all ways agree" in run_on_eight_devices("core_checks")
