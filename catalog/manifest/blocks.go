package manifest

// A block says how an HCL block becomes JSON.
type block struct {
	// labels are the fields that the block's labels fill, in order.
	labels []string
	// list is the field of the enclosing object, a list, to which the block
	// is an element; empty for a block at the top of a file.
	list string
	// inside are the labelled blocks that this one may contain. A block
	// without label that is not among them is an object under its own name.
	inside map[string]block
}

// manifestBlocks are the blocks of files of resources: type is the kind.
func manifestBlocks() map[string]block {
	return map[string]block{
		string(KindNamespace): {labels: []string{"name"}},
		string(KindNode):      {labels: []string{"name"}},
		string(KindService): {labels: []string{"name"}, inside: map[string]block{
			"port": {labels: []string{"name"}, list: "ports"},
		}},
		string(KindIntention): {labels: []string{"source", "destination"}},
		string(KindPolicy):    {labels: []string{"name"}},
		string(KindRole):      {labels: []string{"name"}},
	}
}

// definitionBlocks are the blocks of services.d.
func definitionBlocks() map[string]block {
	return map[string]block{
		string(KindService): {labels: []string{"name"}, inside: map[string]block{
			"port":     {labels: []string{"name"}, list: "ports"},
			"check":    {labels: []string{"name"}, list: "checks"},
			"upstream": {labels: []string{"service"}, list: "upstreams"},
		}},
	}
}
