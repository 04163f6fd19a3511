"""``python -m iommufd`` is the command ``iommufd``."""

from iommufd.cli.main import main_entry

main_entry()
