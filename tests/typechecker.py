"""The checker that the test run puts on our annotations (see `--jaxtyping-packages`)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int serves where a float is asked
