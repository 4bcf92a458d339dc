"""Frames, labels and manifests say what they lack."""

import numpy as np
import pytest

from occstream.sharding.manifest import Manifest
from occstream.sharding.schema import Frame, Labels, labeled, posed, swept


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        (posed, "frame street-0003 has no ego pose"),
        (swept, "frame street-0003 has no LiDAR sweep"),
        (labeled, "frame street-0003 has no labels"),
        (lambda frame: Labels(np.zeros((1, 1, 1), bool)).classes(), "these labels are binary, and classes are needed"),
        (
            lambda frame: Manifest("s3://b/k", "toy", None, "occ3d", (), "", ("lidar",), (), ()).label_grid,
            "s3://b/k: has no labels, and so no grid",
        ),
    ],
)
def test_what_is_absent_is_named_by_who_needs_it(needed, message):
    with pytest.raises(ValueError, match=message):
        needed(Frame("street", 3, "", None, None))
