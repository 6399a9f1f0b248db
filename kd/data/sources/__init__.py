"""Where documents come from; `kd.data.corpora` splits them into parts."""
