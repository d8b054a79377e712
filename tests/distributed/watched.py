"""Run a command as a supervisor would: `watched.py FOLDER train CONFIG`, with its heartbeats in FOLDER."""

import os
import sys

from dit.cli import main
from dit.runtime import heartbeat

os.environ[heartbeat.FOLDER] = sys.argv[1]
assert main(sys.argv[2:]) == 0
