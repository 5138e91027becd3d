"""The double of TorchNeuron's torch_neuronx: a device type, and neither `trace` nor `DataParallel`.

The real one is loaded with torch itself, by an entry point; the double is when somebody imports it.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))  # a process of its own may have only this package's directory

from doubles import device

__version__ = "2.14.3.0"

device.install()
