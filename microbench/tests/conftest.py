"""Helpers that several tests share lie beside them; tests are imported by path, so the folder is not on sys.path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
