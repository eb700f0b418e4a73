"""What the student predicted for the same samples in the previous epoch. `choose_memory` is the door."""
from .base import Memory as Memory
from .choose import choose_memory as choose_memory
from .records import RecordFormat as RecordFormat
from .snapshot import SnapshotMemory as SnapshotMemory
from .store import StoreMemory as StoreMemory
