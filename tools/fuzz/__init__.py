"""Random sequences of calls, played on a real kernel and on the software machine, compared answer by answer."""
