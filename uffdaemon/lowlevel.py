"""The kernel's interface without a daemon: userfaultfds, their features and events, page scans.

Source: userfaultfd(2), ioctl_userfaultfd(2), PAGEMAP_SCAN in ``Documentation/admin-guide/mm/``.
"""

from uffdaemon.kernel.descriptor import supported_features
from uffdaemon.kernel.page_scan import PageCategory, PageRange, scan_pages
from uffdaemon.kernel.userfaultfd import Userfaultfd
from uffdaemon.uapi.events import (
    Event,
    ForkEvent,
    PageFault,
    RemapEvent,
    RemoveEvent,
    UnknownEvent,
    UnmapEvent,
)
from uffdaemon.uapi.features import Features, IoctlSet, RegisterMode
from uffdaemon.uapi.outcomes import Code, Operation, Result, Status

__all__ = [
    "Code",
    "Event",
    "Features",
    "ForkEvent",
    "IoctlSet",
    "Operation",
    "PageCategory",
    "PageFault",
    "PageRange",
    "RegisterMode",
    "RemapEvent",
    "RemoveEvent",
    "Result",
    "Status",
    "UnknownEvent",
    "UnmapEvent",
    "Userfaultfd",
    "scan_pages",
    "supported_features",
]
