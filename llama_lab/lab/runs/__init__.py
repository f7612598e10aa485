"""The runs there are: listed, watched, sent to a tracker."""
