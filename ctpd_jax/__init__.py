"""ctpd_jax: Cross-Tokenizer Preference Distillation in JAX (arXiv 2601.11865).

    import ctpd_jax as ctpd

The public names stand in __init__.pyi, for type checkers, editors and this file alike. Each is imported when it is
first used, so that `ctpd --help` and the text half need neither JAX nor the models.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
