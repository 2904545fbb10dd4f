import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_package_does_without_what_only_the_recipes_need():
    code = (
        "import sys\n"
        "sys.modules['datasets'] = None\n"
        "import genie_diffusers\n"
        "assert not [name for name in sys.modules if name.startswith('genie_diffusers.learning')]"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
