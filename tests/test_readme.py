"""What the README shows runs, and learns."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_first_example():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    reached = float(names["score"](names["params"], names["held_out"]).mean())
    assert reached > -0.2  # -0.69 knows nothing.
