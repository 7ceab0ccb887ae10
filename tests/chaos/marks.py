"""How a fault marks what the engine has to do with a row, and where the engine writes down what it is asked."""

# The variable with the path of a file that gets one byte for every request that reaches the model.
WITNESS = "RAYLM_WITNESS"
# Special tokens of the tiny model's tokenizer: no other text makes their ids. The engine dies, or hangs.
DEADLY, STOPPING = "<|system|>", "<|user|>"
# A word in a row that a scripted engine does not answer while the file exists that the variable has the path of.
HELD, HOLD = "held", "RAYLM_HOLD"
