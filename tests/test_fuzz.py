"Data sets of every format, damaged at random: reading them ends in one typed error, or in a right answer. `make fuzz` does it 2,000 times a format."
import pytest
from fuzz import fuzz
from layouts_catalogs import write_pattern, write_stac, write_table
from layouts_plain import write_plain
from layouts_records import write_cromss_lmdb, write_dfc2020_lmdb, write_noldo_lmdb, write_rico_hdl_lmdb
from layouts_shards import write_ssl4eo_s12_v1_1
from layouts_trees import write_dfc2020, write_noldo_trees, write_noldo_zip, write_ssl4eo, write_ssl4eo_coded, write_ssl4eo_zipped_labels

from cromss.sources import known_sources, recognise

LAYOUTS = [write_plain, write_pattern, write_table, write_stac, write_ssl4eo, write_ssl4eo_coded, write_ssl4eo_zipped_labels, write_ssl4eo_s12_v1_1, write_dfc2020, write_noldo_trees, write_noldo_zip,
           write_cromss_lmdb, write_dfc2020_lmdb, write_noldo_lmdb, write_rico_hdl_lmdb]
CHECKED = (write_ssl4eo_s12_v1_1, write_noldo_zip)     # these formats have checksums of all that is read


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda f: f.__name__.removeprefix("write_"))
def test_fuzz(write, tmp_path): fuzz(write, tmp_path, exact=write in CHECKED, cases=15)


def test_every_format_is_damaged(tmp_path):
    kinds = set()
    for n, write in enumerate(LAYOUTS):
        path, options = write(tmp_path / str(n))
        kinds.add("pattern" if "pattern" in options else recognise(path))
    assert kinds == set(known_sources())
