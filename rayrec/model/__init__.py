"""The models. Tensor names carry their axes:

B batch of visitors   L events of history   N items of the catalogue (index 0 is padding, so tables have N + 1 rows)
D width of vectors    H width of the LSTM   P real positions of a batch (B and L flattened, padding dropped)
C candidates          F features            R rows of a table   M images or sampled negatives   K codes of an item
S height and width of an image
"""
