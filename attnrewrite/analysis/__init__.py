"""Reading the IR: layouts (``views``), what is done to the scores (``scores``), how masks are computed (``masks``)."""
