import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest_toy import flow_pipeline, vp_pipeline  # noqa: F401
