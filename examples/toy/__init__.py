"""The demo's world: preference pairs and two small models, made on the spot, with true rewards that are known.

    world.py     the pairs, and the true reward of every phrase
    models.py    the teacher and the student
    on_disk.py   both as files, for a config to name
    truth.py     what a finished run found, held against the truth

Reading a config imports this package, so it leaves JAX alone: the models are made in a process of their own.
"""

from toy.on_disk import World, settings_in, world_on_disk

__all__ = ["World", "settings_in", "world_on_disk"]
