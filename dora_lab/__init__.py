"""DoRA Lab: the helper module behind the notebooks. Import what you need from its modules.

`dora_lab.speed_up(peft_model)` and `dora_lab.slow_down(peft_model)` stand here as well; they load PEFT when called for.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name in ("speed_up", "slow_down"):
        from dora_lab import speedup

        return getattr(speedup, name)
    raise AttributeError(f"module 'dora_lab' has no attribute {name!r}")
