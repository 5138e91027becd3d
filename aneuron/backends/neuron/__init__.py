"""NeuronCores: models traced with torch_neuronx, or torch_neuron on Inf1, and TorchNeuron's native device."""
