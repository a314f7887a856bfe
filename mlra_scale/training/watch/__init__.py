"""What watches a step beside the signals of `stability`: finite values, step time, profiles, passes over data."""
