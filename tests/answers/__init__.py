"""Answers to the assignments that a check has to accept (RIGHT, by style) or refuse (WRONG, by mistake or cheat).

Each is the source of a solution cell. `HABITS` and `CHEATS` are tried on every exercise that asks for a function.
"""

# What people write around an answer in a notebook, and what must not cost it its points.
HABITS = {
    "display": "{answer}\ndisplay({name})\n",
    "an environment variable": "import os\n\nos.environ['KMP_DUPLICATE_LIB_OK'] = 'TRUE'\n{answer}",
    "help with ?": "{answer}\ntorch.norm?\n",
    "magics": "%matplotlib inline\n!pip list\n{answer}\nget_ipython().run_line_magic('time', '')\n",
    "one's own source": "import inspect\n\n{answer}\nprint(inspect.getsource({name}))\n",
    "a look at the visible test's variables": "{answer}\nprint([rank, not_defined, m, A, B, x, y])\n",
    "an optimiser": "{answer}\ntorch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1).step()\n",
}
CHEATS = {
    "imports PEFT": "import peft\n\n\ndef {name}(*args):\n    return peft.tuners.lora.dora(*args)\n",
    "imports the lab": "from dora_lab.adapters import *\n\n\ndef {name}(*args):\n    return dora_weight(*args)\n",
    "imports the lab late": "def {name}(*args):\n    import dora_lab.kernels as k\n    return k.dora_product(*args)\n",
    "reads the answer off the test's frames": (
        "import sys\n\n\ndef {name}(*args):\n    frame = sys._getframe()\n    while frame:\n"
        "        for key in ('right', 'wanted', 'bound', 'length'):\n            if key in frame.f_locals:\n"
        "                return frame.f_locals[key]\n        frame = frame.f_back\n    return args[0]\n"
    ),
    "reads the notebook": (
        "from pathlib import Path\n\n\n"
        "def {name}(*args):\n    return [p.read_text() for p in Path('..').glob('**/*.ipynb')]\n"
    ),
    "an object that equals everything": (
        "class Yes:\n    shape, dtype, requires_grad = (1,), None, True\n    __eq__ = __le__ = lambda a, b: True\n"
        "    __sub__ = __rsub__ = __mul__ = __getitem__ = lambda a, b: a\n    __iter__ = lambda a: iter([a, a])\n"
        "    __getattr__ = lambda a, n: a\n    __call__ = lambda a, *b: a\n    __bool__ = lambda a: True\n\n\n"
        "def {name}(*args):\n    return Yes()\n"
    ),
    "a comparison of its own": (
        "import __main__\n\n__main__.close = close = lambda a, b: True\nsame_number = lambda a, b: True\n\n\n"
        "def {name}(*args):\n    return args[0]\n"
    ),
    "a tensor that agrees": (
        "class Agreeing(torch.Tensor):\n    @classmethod\n    def __torch_function__(cls, *rest):\n"
        "        return True\n\n\ndef {name}(*args):\n    return args[0].as_subclass(Agreeing)\n"
    ),
}
