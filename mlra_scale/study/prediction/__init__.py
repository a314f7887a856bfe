"""Whether TEV warns before an event: the protocol of docs/studies/predict.md, carried out on the runs of a sweep."""
