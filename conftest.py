"""What pytest leaves out where a package of an optional extra is missing."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("torch") else ["fastce/torch"]
