"""Imported from the root folder, the files of this one find each other as they do when they are run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # at the end: a program's own files of such names come first
