"""What arXiv:2504.02507 reports: a LLaMA of 1 B parameters after 50 B tokens, one run each; rows by their label here.

HellaSwag and WinoGrande in per cent. In Table 2 ZClip has z_thresh=2 at the two highest rates; all other tables are at
a rate of 1e-3.
"""

RATE_COLUMNS = ("rate", "training loss", "HellaSwag", "WinoGrande")
TEST_COLUMNS = ("test loss", "spikes", "HellaSwag", "WinoGrande")
TRAIN_COLUMNS = ("training loss", "spikes", "HellaSwag", "WinoGrande")

# Table 2: for each rate
RATES = (
    {"fixed 1": ("1e-4", "2.46", "33.92", "51.22"), "paper": ("1e-4", "2.46", "34.12", "53.35")},
    {"fixed 1": ("3e-4", "2.34", "42.34", "50.35"), "paper": ("3e-4", "2.33", "42.56", "51.53")},
    {"fixed 1": ("5e-4", "2.27", "45.27", "52.32"), "paper": ("5e-4", "2.24", "45.62", "52.48")},
    {"fixed 1": ("7e-4", "2.29", "44.27", "54.14"), "paper": ("7e-4", "2.20", "46.94", "52.72")},
    {"fixed 1": ("1e-3", "2.34", "43.01", "52.32"), "paper": ("1e-3", "2.18", "49.30", "54.85")},
    {"fixed 1": ("3e-3", "5.14", "25.60", "49.03"), "paper": ("3e-3", "2.14", "50.82", "53.27")},
    {"fixed 1": ("5e-3", "7.28", "25.89", "49.32"), "paper": ("5e-3", "5.91", "25.27", "48.46")},
)

# Table 3
METHODS = {
    "none": ("2.90", "12", "31.01", "51.01"),
    "fixed 1": ("2.33", "6", "43.01", "52.32"),
    "autoclip": ("2.20", "0", "48.10", "53.67"),
    "paper": ("2.18", "0", "49.30", "54.85"),
}

# Table 5
OPTIONS = {
    "max": ("2.19", "1", "48.02", "53.35"),
    "mean": ("2.18", "0", "48.90", "54.22"),
    "reciprocal (paper)": ("2.18", "0", "49.30", "54.85"),
}

# Table 6, and what the table leaves out: the share of all steps until the end that were clipped, read off by eye from a
# figure in the authors' public repository.
THRESHOLD_COLUMNS = (*TRAIN_COLUMNS, "clipped")
Z_THRESH = {
    1.5: ("2.182", "0", "48.70", "52.23", "36%"),
    2.0: ("2.180", "0", "48.75", "54.23", "12%"),
    2.5: ("2.180", "0", "49.30", "54.85", "5.5%"),
    3.0: ("2.194", "0", "48.94", "53.27", "3.5%"),
    3.5: ("2.202", "1", "48.30", "53.67", "3%"),
    4.0: ("2.201", "1", "48.58", "55.40", "2.5%"),
}

# Table 7
ALPHA = {
    0.90: ("2.190", "0", "48.04", "54.01"),
    0.93: ("2.185", "0", "48.99", "54.38"),
    0.95: ("2.186", "0", "48.91", "53.98"),
    0.97: ("2.180", "0", "49.30", "54.85"),
    0.98: ("2.189", "0", "48.51", "52.09"),
    0.99: ("2.189", "0", "48.45", "53.74"),
}
