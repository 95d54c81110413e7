// Builds the map and the neighbour lists of a grid (grids.h), once, for all instruction sets.
// Follows iq2xs_init_impl and iq3xs_init_impl in ggml-quants.c; see LICENSE.ggml in this folder.
#include "grids.h"

#include <cstdlib>
#include <cstring>

namespace localmix {

Grid grids[GRIDS] = {
    {8, 2, 3, 2, nullptr, nullptr},  // IQ2_XXS
    {8, 2, 3, 2, nullptr, nullptr},  // IQ2_XS
    {8, 2, 3, 1, nullptr, nullptr},  // IQ2_S
    {8, 2, 3, 3, nullptr, nullptr},  // IQ1_S and IQ1_M
    {4, 3, 8, 2, nullptr, nullptr},  // IQ3_XXS
    {4, 3, 8, 3, nullptr, nullptr},  // IQ3_S
};

// The farthest two points can be from each other: 8 * 2 * 2 or 4 * 7 * 7.
constexpr int FARTHEST = 196;
constexpr int ALIGNED = 16, LONGEST = 511;

// The point after this one; false after the last.
static bool next_point(const Grid& grid, int& point) {
    for (int shift = 0; shift < grid.dimensions * grid.bits; shift += grid.bits) {
        const int level = point >> shift & ((1 << grid.bits) - 1);
        if (level + 1 < grid.levels) {
            point += 1 << shift;
            return true;
        }
        point -= level << shift;
    }
    return false;
}

// The squared distance of every point on the grid from one, and how many lie at each.
static void measure(const Grid& grid, const uint16_t* points, int count, int from, uint8_t* distance, int* found) {
    memset(found, 0, (FARTHEST + 1) * sizeof *found);
    const int mask = (1 << grid.bits) - 1;
    memset(distance, 0, count);
    for (int shift = 0; shift < grid.dimensions * grid.bits; shift += grid.bits) {
        const int level = from >> shift & mask;
        for (int i = 0; i < count; i++) {
            const int apart = (points[i] >> shift & mask) - level;
            distance[i] += uint8_t(apart * apart);
        }
    }
    for (int i = 0; i < count; i++) found[distance[i]]++;
}

static bool build(Grid& grid, const uint16_t* points, int count) {
    const int size = 1 << grid.dimensions * grid.bits;
    int32_t* map = (int32_t*)malloc(size * sizeof *map);
    uint8_t* distance = (uint8_t*)malloc(count);
    size_t room = size_t(1) << 18, used = 0;
    uint16_t* lists = (uint16_t*)malloc(room * sizeof *lists);
    bool ok = map && distance && lists;
    if (ok) {
        memset(map, -1, size * sizeof *map);
        for (int i = 0; i < count; i++) map[points[i] & (size - 1)] = i;
    }
    int point = 0;
    do {
        if (!ok || map[point] >= 0) continue;
        int found[FARTHEST + 1], start[FARTHEST + 1], length = 0, reached = 0;
        measure(grid, points, count, point, distance, found);
        for (int d = 0; d <= FARTHEST; d++) {
            start[d] = -1;
            if (!found[d] || reached == grid.distances) continue;
            start[d] = length;
            length += found[d];
            reached++;
        }
        if (length > LONGEST) {
            ok = false;
            break;
        }
        const size_t filled = (length + ALIGNED - 1) / ALIGNED * ALIGNED;
        if (used + filled > room) {
            room *= 2;
            uint16_t* more = (uint16_t*)realloc(lists, room * sizeof *lists);
            if (!more) {
                ok = false;
                break;
            }
            lists = more;
        }
        for (int i = 0; i < count; i++)
            if (start[distance[i]] >= 0) lists[used + start[distance[i]]++] = points[i];
        for (size_t i = length; i < filled; i++) lists[used + i] = lists[used + length - 1];
        map[point] = ~int32_t(used / ALIGNED << 9 | length);
        used += filled;
    } while (ok && next_point(grid, point));
    free(distance);
    if (!ok) {
        free(map);
        free(lists);
        return false;
    }
    grid.neighbours = lists;
    grid.map = map;
    return true;
}

}  // namespace localmix

// Hand over the points of a grid by number (GridName), before the first kernel that stands on it and before threads
// race for it. 1: done, now or earlier. 0: no memory, or not such a grid.
extern "C" __attribute__((visibility("default"))) int localmix_set_grid(int name, const uint16_t* points, int count) {
    if (name < 0 || name >= localmix::GRIDS || count <= 0) return 0;
    localmix::Grid& grid = localmix::grids[name];
    return grid.map || localmix::build(grid, points, count);
}
