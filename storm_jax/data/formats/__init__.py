"""The files that records are kept in: one module a format, one class `RecordSet` in each."""
