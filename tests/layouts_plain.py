"The smallest data set in the plain layout, for damage."
import numpy as np
from test_sources import RGBN, label, s1, s2, write_tif


def write_plain(folder):
    for place in ("a", "b"):
        for season in ("2021-04", "2021-07"):
            at = folder / place / season
            write_tif(at / "s1.tif", s1(seed=len(place + season)), ("VV", "VH"))
            write_tif(at / "s2.tif", s2(), RGBN, 0)
            write_tif(at / "label.tif", label(), nodata=255)
    (folder / "dataset.yaml").write_text("label_nodata: [255]\nlevel: L1C\n")
    probabilities = np.full((9, *label().shape[1:]), 1 / 9, np.float32)
    write_tif(folder / "a/2021-04/probabilities.tif", probabilities)
    return folder, {}
