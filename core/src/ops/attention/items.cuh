// Attention: how the work of a launch is divided. One launch covers all segments of one length; its blocks are work items,
// numbered segment by segment.

#define MAX_SEGMENTS 4

// Images with equally many tokens, in consecutive packed rows; `SegmentArg` of cuda.rs.
struct Segment {
    const void* sin;  // [P, d] each, or null; the storage type is that of the queries
    const void* cos;
    const void* bias;  // [H, P, P], or null
    int images, tokens;
    int prefix;          // tokens before the P patches: neither rotated nor biased
    int first_row;       // the packed row of the first image's first token
    int first_item;      // the launch's first work item in this segment
    int rows_per_item;   // rows of an image that an item computes
    int heads_per_item;  // heads that an item computes
    int chunk;           // rows in shared memory at a time (of each of the item's heads)
    int slots, unused;   // chunks that there is room for: one for each head, or two that take turns
};

// `SegmentsArg` of cuda.rs.
struct Segments {
    Segment at[MAX_SEGMENTS];
    int count, heads;
    int head_dim;
    int images_per_part;  // for dbias, which is summed over parts of the images first
};

// Rows [row, row + rows) of heads [head, head + heads) of one image.
struct Item {
    Segment segment;
    int image_row;  // the packed row of the image's first token
    int head, heads;
    int row, rows;
    int total_heads;

    // Where a row's normaliser is: for each image [H, tokens].
    __device__ __forceinline__ size_t sums(int h) const {
        return (size_t)image_row * total_heads + (size_t)h * segment.tokens;
    }
};

// Items run over heads first (neighbours in memory), then rows, then images.
__device__ __forceinline__ Item item_of(const Segments& all, int index) {
    Item item;
    item.segment = all.at[0];
#pragma unroll
    for (int i = 1; i < MAX_SEGMENTS; i++) {
        if (i < all.count && index >= all.at[i].first_item) item.segment = all.at[i];
    }
    const Segment& s = item.segment;
    index -= s.first_item;
    const int head_groups = (all.heads + s.heads_per_item - 1) / s.heads_per_item;
    const int row_groups = (s.tokens + s.rows_per_item - 1) / s.rows_per_item;
    item.total_heads = all.heads;
    item.head = index % head_groups * s.heads_per_item;
    item.heads = min(s.heads_per_item, all.heads - item.head);
    index /= head_groups;
    item.row = index % row_groups * s.rows_per_item;
    item.rows = min(s.rows_per_item, s.tokens - item.row);
    item.image_row = s.first_row + index / row_groups * s.tokens;
    return item;
}

// Eight elements, in pairs.
struct alignas(16) Eight {
    u32 pair[4];
};
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
